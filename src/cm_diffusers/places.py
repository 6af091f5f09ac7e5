"""Where things lay, as others may read it: no path of this machine, no secret of an address."""

import re


LOCAL = re.compile(r"[/~]|[A-Za-z]:[\\/]|\\\\|file:")  # how a path of a machine begins
STEPS = re.compile(r"[\\/]+")
ADDRESS = r"\s*[A-Za-z][\w+.-]*://"
ADDRESSES = re.compile(rf"(,)(?={ADDRESS})")  # a comma behind a query may belong to it
USER = re.compile(r"(?<=://)[^/\s'\"]*@")
QUERY = re.compile(rf"([A-Za-z][\w+.-]*://[^\s?#'\"]*)[?#](?:(?!,{ADDRESS})[^\s'\")])*")
PREFIX = r"(?<=[\w.]{2})(?<!file):(?!//)"  # of a reward, as in classifier:FOLDER
PLACES = re.compile(rf"(,|{PREFIX})(?={ADDRESS}|\s*(?:{LOCAL.pattern}|\.\.[\\/]))")


def public(value: object) -> object:
    """Paths of the machine become their last part; addresses lose user, password, query and fragment, where secrets are.

    Both also in lists separated by commas, and behind a word and a colon. Everything else is left.
    """
    if isinstance(value, list):
        return [public(item) for item in value]
    if not isinstance(value, str):
        return value
    return "".join(map(_public_place, (ADDRESSES if set("?#") & set(value) else PLACES).split(value)))


def without_secrets(value: object) -> object:
    """Addresses in a text, or in texts of a list, lose user, password, query and fragment; everything else is left."""
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return USER.sub("", QUERY.sub(r"\1", value)) if isinstance(value, str) else value


def _public_place(text: str) -> str:
    text = without_secrets(text)
    place = text.strip()
    if LOCAL.match(place) or (".." in STEPS.split(place) and "://" not in place):
        return next((part for part in reversed(STEPS.split(place)) if part), text)
    return text
