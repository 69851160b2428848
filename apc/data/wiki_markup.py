"""Wikipedia markup as plain text."""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mwparserfromhell.wikicode import Wikicode

DROPPED_TAGS = re.compile("ref|references|table|gallery|imagemap|timeline|score|source|syntaxhighlight|hr")
DROPPED_LINKS = re.compile("file|image|category|media")
DROPPED_SECTIONS = re.compile(
    "references|external links|see also|further reading|notes|bibliography|footnotes|citations|sources|"
    "notes and references|references and notes|works cited"
)
# Templates whose text is part of a sentence. The text is the first positional argument, or the argument at the index in
# SPOKEN_TEMPLATES. `_render_template` has rules for a few others and drops the rest.
SPOKEN_FIRST = re.compile(
    "lang-.*|nowrap|small|smaller|nihongo|quote|angbr|vanchor|keypress|val|nts|abbr|sub|sup", re.DOTALL
)
SPOKEN_TEMPLATES = {"lang": 1, "transl": -1}
TEMPLATE_SIGNS = {"nbsp": " ", "'s": "'s", "·": "·", "'": "'", "pi": "π"}
TEMPLATE_SIGNS |= {"spaced ndash": " – ", "snd": " – ", "ndash": "–", "mdash": "—"}


def plain_text(markup: str) -> str:
    """Wiki markup as prose, without tables, pictures, references and boxes.

    Each heading is a line of its own, and a blank line separates paragraphs.
    """
    import mwparserfromhell

    blocks, dropped_level = [], 0
    # Regular expressions remove comments, references and quote marks: the parser gives up on a table or link with an
    # unclosed one in it.
    code = mwparserfromhell.parse(UNSEEN.sub("", markup), skip_style_tags=True)
    for section in code.get_sections(flat=True, include_lead=True):
        heading = next(iter(section.filter_headings(recursive=False)), None)
        if heading is not None:
            title = _tidy(_render(heading.title))
            if dropped_level and heading.level > dropped_level:
                continue  # a subsection of a dropped section
            dropped_level = heading.level if DROPPED_SECTIONS.fullmatch(title.lower()) else 0
            if dropped_level:
                continue
        body = _tidy("".join(_render_node(node) for node in section.nodes if node is not heading))
        if body:
            blocks += [title, body] if heading is not None else [body]
    return "\n\n".join(blocks)


def _render(code: "Wikicode | None") -> str:
    return "" if code is None else "".join(_render_node(node) for node in code.nodes)


def _render_node(node) -> str:
    from mwparserfromhell import nodes

    match node:
        case nodes.Text():
            return node.value
        case nodes.HTMLEntity():
            return node.normalize()
        case nodes.Template():
            return _render_template(node)
        case nodes.Tag():
            return _render_tag(node)
        case nodes.Wikilink():
            namespace = str(node.title).partition(":")[0].strip().lower()
            return "" if DROPPED_LINKS.fullmatch(namespace) else _render(node.text or node.title).removeprefix(":")
        case nodes.ExternalLink():
            return _render(node.title)
        case _:
            return ""  # comments, and template arguments, which are not expanded


def _render_tag(tag) -> str:
    name = str(tag.tag).strip().lower()
    if DROPPED_TAGS.fullmatch(name):
        return ""
    if name == "br":
        return "\n"
    inner = _render(tag.contents)
    if name == "sup" and re.fullmatch(r"[-−–+]?\d+", inner):
        return f"^{inner}"  # 10^5 must not read as 105
    if name == "math":
        return inner.replace("{", "{ ").replace("}", " }").strip()  # TeX braces would look like template braces
    return f"\n\n{inner}\n\n" if name in {"blockquote", "poem"} else inner


def _render_template(template) -> str:
    name = " ".join(str(template.name).lower().replace("_", " ").split())
    args = [_render(param.value).strip() for param in template.params if not param.showkey]
    if name in TEMPLATE_SIGNS:
        return TEMPLATE_SIGNS[name]
    if name in ("convert", "cvt"):
        return _converted(args)
    if name == "as of":
        return " ".join(["as of" if template.has("lc") else "As of", *args])
    if name == "frac":
        return "/".join(args if len(args) > 1 else ["1", *args])
    if name == "chem":
        return "".join(args).replace("''", "")
    index = 0 if SPOKEN_FIRST.fullmatch(name) else SPOKEN_TEMPLATES.get(name)
    return args[index] if index is not None and len(args) > max(index, 0) else ""


def _converted(args: list[str]) -> str:
    """`{{convert|5|to|9|km|mi}}` → "5 to 9 km": numbers and words between them, up to the first unit."""
    count = 3 if len(args) > 3 and args[1] in {"to", "-", "–", "and", "by", "x", "or", "×"} else 1
    return " ".join(args[: count + 1])


UNSEEN = re.compile(r"<!--.*?-->|<ref\b[^>]*/>|<ref\b[^>]*>.*?</ref *>", re.DOTALL | re.IGNORECASE)
# The order matters: dropping the parts of a parenthesis can empty it, and dropping that leaves a space before a comma.
TIDYING = [
    (re.compile(r"[ \t\u00a0\u2009\u202f]+"), " "),
    (re.compile(r"__[A-Z]+__|'{5}|'{3}(?!s\b)|'{2}"), ""),  # ''Emma'''s is italics and a genitive
    (re.compile(r"\(\s*(?:[,;:/–-]\s*|or\s+(?=\)))+"), "("),
    (re.compile(r"\s*(?:[,;:]\s*)+\)"), ")"),
    (re.compile(r"([,;])(?:\s*[,;])+"), r"\1"),
    (re.compile(r"[,;]+\.(?!\.)"), "."),
    (re.compile(r" ?\(\s*\)| ?\[\s*\]"), ""),
    (re.compile(r"\( +"), "("),
    (re.compile(r" +([,.;:!?)])(?=[\s)]|$)", re.MULTILINE), r"\1"),
    (re.compile(r"^ *(?:[|!]|\{\||\[\[(?:File|Image):).*$", re.MULTILINE), ""),  # an unclosed table or picture
    (re.compile(r"^[ *#:;]+| +$", re.MULTILINE), ""),
    (re.compile(r" {2,}"), " "),
    (re.compile(r"\n{3,}"), "\n\n"),
]


def _tidy(text: str) -> str:
    """Cleans up after dropped markup: empty parentheses, stray punctuation, table rows, runs of blank lines."""
    for pattern, replacement in TIDYING:
        text = pattern.sub(replacement, text)
    return text.strip()
