"""The documentation site and README, made from the notebooks: `python -m docs.build` and `python -m docs.readme`."""
