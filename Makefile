# Thin verbs. `make run` and `make test` are all a newcomer needs; the rest are conveniences.
PYTHON ?= python3
BIN := .venv/bin
CASE ?= medical
export OMP_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: run test course site lab claims export hooks clean

run: .venv/.installed ## the main job: install, then one case end to end
	$(BIN)/bigmodel run $(CASE) --out runs/$(CASE)

test: .venv/.tested-with ## every notebook, gate and test
	$(BIN)/pytest -n 2 --dist loadgroup

course: .venv/.tested-with ## execute the notebooks cold, two at a time
	$(BIN)/bigmodel course -j 2

claims: .venv/.installed ## the articles' claims, measured here
	$(BIN)/bigmodel claims

site: .venv/.tested-with ## build the documentation into _site/
	$(BIN)/python docs/build.py

lab: .venv/.tested-with ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir nbs $(if $(filter 0,$(shell id -u)),--allow-root)

export: .venv/.tested-with ## notebooks -> library, notebooks cleaned, README written
	$(BIN)/nbdev_export && $(BIN)/nbdev_clean && $(BIN)/python docs/readme.py

hooks: .venv/.tested-with ## git hooks and the notebook merge driver
	$(BIN)/nbdev_install_hooks

clean: ## remove everything that make made
	rm -rf .venv _site _proc build runs *.egg-info

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: .venv/bin/python settings.ini setup.py
	$(BIN)/python -m pip install -q -e '.[all]' && $(BIN)/bigmodel data fetch && touch $@

.venv/.tested-with: .venv/.installed
	$(BIN)/python -m pip install -q -e '.[all,dev]' && sh tests/system_parts.sh && touch $@
