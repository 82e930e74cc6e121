# make demo   export the embedded model at 4 bits and 320 tokens, and ask it about a picture
# make test   lint, types and the whole test suite
# Both make a virtual environment in .venv first. PYTHON=python3.12 takes another Python, VENV=folder another place.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin

.PHONY: demo test clean

demo: $(VENV)/.demo
	@echo "make demo: the export and one question, half a minute on two cores; nothing is downloaded"
	$(BIN)/vz-edge export --model vz-demo --bits 4 --tokens 320 --out bundles/vz-demo --force
	$(BIN)/vz-edge run bundles/vz-demo --image examples/scene.jpg "how many circles do you see?"

test: $(VENV)/.test
	@echo "make test: lint, types and all tests, about 10 minutes on two cores; nothing is downloaded"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/pytest -n 2

$(VENV)/.demo: pyproject.toml constraints.txt
	$(call install,cpu$(comma)export,2.9 GB$(comma) or 0.1 GB where a CPU build of torch is there already)
	touch $@

$(VENV)/.test: pyproject.toml constraints.txt
	$(call install,cpu$(comma)export$(comma)dev,3.2 GB$(comma) or 0.5 GB where a CPU build of torch is there already)
	touch $@

# $(call install,EXTRAS,SIZE): this package and what the extras bring; says before what that costs.
define install
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "vz-edge needs Python 3.10 or later, this is " \
	+ sys.version.split()[0] + "; choose another one: make PYTHON=python3.12 ...")'
@echo "first a virtual environment in $(VENV), which takes a few minutes: pip downloads about $(2)"
@echo "(README.md, Installing, says how to get one: without a GPU, torch's CUDA libraries are most of it)"
$(PYTHON) -m venv $(VENV)
$(BIN)/pip install -q -c constraints.txt -e '.[$(1)]'
endef
comma := ,

clean:
	rm -rf $(VENV) bundles build dist
