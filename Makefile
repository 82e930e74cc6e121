# make demo   export the embedded model at 4 bits and 320 tokens, and ask it about a picture
# make test   lint, types and the whole test suite in a fresh virtual environment
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/.demo
	$(BIN)/vz-edge export --model vz-demo --bits 4 --tokens 320 --out bundles/vz-demo --force
	$(BIN)/vz-edge run bundles/vz-demo --image examples/scene.jpg "how many circles do you see?"

test: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[cpu,export]'
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e '.[cpu,export,dev]'
	touch $@

clean:
	rm -rf $(VENV) bundles build dist
