"""The data of the task `wikitext_local`: a text of WikiText from a local file."""

import re
from pathlib import Path

from datasets import Dataset

from apc.utils.errors import UserError


def documents(file: str = "", **_) -> dict[str, Dataset]:
    """One document for each article of a text, as in the data set of the harness's task `wikitext`.

    file: for example wiki.test.raw. An article begins at a title of the first level: ` = Robert Boulter = `.
    """
    if not Path(file).is_file():
        raise UserError(f"{file or 'file'}: no such file; name a text: --metadata file=wiki.test.raw")
    pages: list[list[str]] = [[]]
    for line in Path(file).read_text(encoding="utf-8").split("\n"):
        if re.fullmatch(r"\s*= (?!=).*(?<!=) =\s*", line):
            pages.append([])
        pages[-1].append(line)
    return {"test": Dataset.from_dict({"page": [page for page in map("\n".join, pages) if page.strip()]})}
