"""Sphinx configuration. The pages are the processed notebooks that `docs/build.py` writes."""

import configparser
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs" / "_ext"))
_settings = configparser.ConfigParser(interpolation=None)
_settings.read(ROOT / "settings.ini", encoding="utf-8")
_about = _settings["DEFAULT"]

project = _about["title"]
author = _about["author"]
copyright = _about["copyright"].replace("%(author)s", author)
release = version = _about["version"]
language = "en"

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx_design", "sphinx_copybutton", "mermaid", "two_languages"]
nb_execution_mode = "off"
nb_execution_cache_path = str(ROOT / "_proc" / "unused")
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_number_source_lines = False
myst_enable_extensions = ["alert", "amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
suppress_warnings = ["config.cache"]

# Types of other libraries have no page here; our own must resolve.
nitpick_ignore_regex = [("py:class", r"(?!bigmodel_nb\.).*")]
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/logo.svg"
html_search_language = "en_zh"
html_show_search_summary = False  # a summary is fetched, and browsers refuse fetch() on file://
html_last_updated_fmt = None
html_context = {"default_mode": "auto"}
html_theme_options = {
    "navbar_persistent": [],
    "home_page_in_toc": True,
    "show_navbar_depth": 1,
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "logo": {"image_light": "_static/logo.svg", "image_dark": "_static/logo.svg", "text": project,
             "alt_text": f"{project}, home"},
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "extra_footer": "Shown with Sphinx, MathJax (Apache-2.0) and Mermaid (MIT); nothing is loaded from elsewhere.",
}
mathjax_path = "mathjax/tex-chtml.js"
# No assistive explorer and no menu: both would load further parts of MathJax on demand.
mathjax3_config = {"options": {"enableMenu": False}}
copybutton_selector = "div.cell_input div.highlight pre, div.highlight-bash pre, div.highlight-console pre"
