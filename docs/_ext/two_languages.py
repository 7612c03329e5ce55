"""Search for English and Chinese together: English words are stemmed, a run of Han characters is indexed as its pairs.

Sphinx's own Chinese search breaks all search in 9.0.4. Pairs need no dictionary: a query of two or more characters
becomes its pairs, which must all stand on the page; a single character is looked up as itself.
"""

import re

from sphinx.search import SearchEnglish

HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_PIECE = re.compile(rf"[{HAN}]+|[^\W{HAN}]+")


class EnglishChinese(SearchEnglish):
    """English stemmer and stop words, with Han runs cut into pairs."""

    lang = "en_zh"
    js_splitter_code = (
        "var splitQuery = (query) => (query.match(/[HAN]+|(?:(?![HAN])[\\p{L}\\p{N}_])+/gu) || []).flatMap((w) =>\n"
        "  /^[HAN]{2,}$/u.test(w) ? Array.from(w).slice(1).map((c, i) => Array.from(w)[i] + c) : [w]);\n"
        "window.splitQuery = splitQuery;\n"
    ).replace("HAN", "\\u3400-\\u4dbf\\u4e00-\\u9fff")

    def split(self, text: str) -> list[str]:
        words: list[str] = []
        for piece in _PIECE.findall(text):
            if re.match(f"[{HAN}]", piece):
                words += [*piece, *(piece[i : i + 2] for i in range(len(piece) - 1))]
            else:
                words.append(piece)
        return words


def setup(app) -> dict:
    app.add_search_language(EnglishChinese)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
