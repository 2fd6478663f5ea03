"""Reference model, data: turn the source of a manual page (man or mdoc macros) into plain text."""

import re

_FONT = re.compile(r"\\f(?:\[[^\]]*\]|\(..|.)")
_SIZE = re.compile(r"\\s[+-]?\d{1,2}")
_STRING = re.compile(r"\\\*(?:\[[^\]]*\]|\(..|.)")
_SPECIAL = re.compile(r"\\(?:\[([^\]]*)\]|\((..))")
_COMMENT = re.compile(r'\\["#].*')
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"|(\S+)')
_GLYPHS = {
    "aq": "'", "cq": "'", "oq": "'", "lq": '"', "rq": '"', "dq": '"', "em": "--", "en": "-",
    "mi": "-", "bu": "*", "co": "(c)", "ha": "^", "ti": "~", "rs": "\\", "ga": "`", "pl": "+",
}  # fmt: skip
_HEADINGS = {"SH", "SS", "Sh", "Ss"}
_PARAGRAPHS = {"PP", "P", "LP", "Pp", "TP", "TQ", "HP", "sp", "RS", "RE", "EX", "EE", "nf", "fi"}
# Macros whose arguments are text: the fonts of man(7) and the phrases of mdoc(7).
_ALTERNATING = {"BR", "RB", "IR", "RI", "BI", "IB", "MR"}  # two fonts, no spaces between
_PHRASES = {
    "B", "I", "SM", "SB", "IP",
    "Nm", "Nd", "Ar", "Cm", "Pa", "Em", "Sy", "Va", "Fn", "Ft", "Fa", "Ev", "Xr", "It", "Op",
    "Dq", "Sq", "Ql", "Li", "Dv", "Er", "In", "Vt", "Tn", "Ic",
}  # fmt: skip


def roff_to_text(source: str) -> str:
    """Return the readable text of a manual page, or "" for a page that only includes another.

    Layout requests, conditionals, macro definitions and tables are dropped: the aim is text with
    the vocabulary and the rhythm of manual pages, not a faithful rendering.
    """
    lines: list[str] = []
    skip_until = ""
    for line in source.splitlines():
        if skip_until:
            skip_until = "" if line.startswith(skip_until) else skip_until
        elif line.startswith((".de", ".am", ".ig")):
            skip_until = ".."
        elif line.startswith(".TS"):
            skip_until = ".TE"
        elif line.startswith((".", "'")):
            lines.extend(_macro_lines(line[1:]))
        else:
            lines.append(_plain(line).rstrip())
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n" if any(lines) else ""


def _macro_lines(request: str) -> list[str]:
    """Text lines of one control line, given without its leading dot."""
    name, _, rest = request.partition(" ")
    if name in _PARAGRAPHS:
        return [""]
    words = [_plain(quoted or bare) for quoted, bare in _ARGUMENT.findall(rest)]
    if not words:
        return []
    if name == "TH":  # title, section, then date and source, which are left out
        return [f"{words[0]}({words[1]})" if len(words) > 1 else words[0], ""]
    if name in _HEADINGS:
        return ["", " ".join(words), ""]
    if name == "Fl":
        return ["-" + " -".join(words)]
    separator = "" if name in _ALTERNATING else " "
    return [separator.join(words).rstrip()] if name in _PHRASES | _ALTERNATING else []


def _plain(text: str) -> str:
    """Resolve roff escapes: fonts and sizes vanish, glyphs become ASCII."""
    text = _COMMENT.sub("", text)
    text = _SIZE.sub("", _FONT.sub("", _STRING.sub("", text)))
    text = _SPECIAL.sub(lambda found: _GLYPHS.get(found.group(1) or found.group(2), ""), text)
    text = text.replace("\\-", "-").replace("\\~", " ").replace("\\ ", " ").replace("\\'", "'")
    text = text.replace("\\e", "\0").replace("\\\\", "\0")
    return re.sub(r"\\.?", "", text).replace("\0", "\\")
