"""Texts of the user in Markdown that show what they are."""

import re


MARKS = {"|": "&#124;", "<": "&lt;", "`": "&#96;", "*": "&#42;", "](": "]&#40;"}


def cell(value: object) -> str:
    """A text in a sentence or a table: bars, HTML, line breaks and other marks do not act."""
    text = re.sub(r"&(?=#?\w+;)", "&amp;", " ".join(str(value).splitlines()))
    return re.sub(r"[|<`*]|\]\(", lambda mark: MARKS[mark[0]], text)


def fenced(language: str, code: str) -> str:
    """A block of code, whatever is in it."""
    longest = max(map(len, re.findall("`{3,}", code)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"
