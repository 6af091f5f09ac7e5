"""Where things lay, as others may read it: no path of this machine, no secret of an address."""

import re


LOCAL = re.compile(r"[/~]|[A-Za-z]:[\\/]|\\\\|file:")  # how a path of a machine begins
STEPS = re.compile(r"[\\/]+")
ADDRESS = r"\s*[A-Za-z][\w+.-]*://"
ADDRESSES = re.compile(rf"(,)(?={ADDRESS})")  # a comma behind a query may belong to it
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


def _public_place(text: str) -> str:
    if "://" in text:
        text = re.sub(r"://[^/]*@", "://", re.split(r"[?#]", text)[0])
    place = text.strip()
    if LOCAL.match(place) or (".." in STEPS.split(place) and "://" not in place):
        return next((part for part in reversed(STEPS.split(place)) if part), text)
    return text
