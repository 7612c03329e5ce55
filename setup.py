"""Packaging, read from settings.ini: each `<name>_requirements` key is an extra, `all` is their union."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]


def requirements(key: str) -> list[str]:
    "The requirements under `key`, one to a word."
    return cfg.get(key, "").split()


extras = {k.removesuffix("_requirements"): requirements(k) for k in cfg if k.endswith("_requirements")}
not_in_all = {"dev", "spark"}
extras["all"] = sorted({r for name, reqs in extras.items() if name not in not_in_all for r in reqs})

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0", license_files=["LICENSE"],
    keywords=cfg["keywords"],
    url=cfg["git_url"],
    packages=find_packages(include=["bigmodel_nb", "bigmodel_nb.*"]),
    package_data={"bigmodel_nb": ["py.typed", "**/*.json", "**/*.html", "**/*.css"]},
    python_requires=f">={cfg['min_python']}",
    install_requires=requirements("requirements"),
    extras_require=extras,
    entry_points={"console_scripts": ["bigmodel = bigmodel_nb.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Programming Language :: Python :: 3",
    ],
    zip_safe=False,
)
