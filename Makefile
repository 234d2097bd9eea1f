# pgworker for packagers and for `make install`. To try it or to test it, ./run needs neither make nor pg_config.
#
#   make install PG_CONFIG=/usr/lib/postgresql/17/bin/pg_config
#   make install DESTDIR=/tmp/package

EXTENSION  = pgworker
EXTVERSION = $(shell sed -n "s/^default_version *= *'\(.*\)'/\1/p" $(EXTENSION).control)
SCRIPT     = $(EXTENSION)--$(EXTVERSION).sql
PARTS      = $(addprefix extension/,$(shell cat extension/load_order))
DATA_built = $(SCRIPT)
DATA       = $(wildcard upgrade/$(EXTENSION)--*--*.sql)
FORWARDED  = demo test lint bench

PG_CONFIG ?= pg_config

# Goals that need no server installation must work where there is none.
ifneq ($(filter-out all help $(FORWARDED) $(SCRIPT),$(or $(MAKECMDGOALS),all)),)
PGXS := $(shell $(PG_CONFIG) --pgxs)
ifeq ($(PGXS),)
$(error $(PG_CONFIG) did not run: install PostgreSQL's development files or name its pg_config with PG_CONFIG=/path/to/pg_config)
endif
include $(PGXS)
endif

all: $(SCRIPT) ## build the extension's script (the default)

# printf, not echo: some shells' echo would turn the \e of \echo into an escape character.
$(SCRIPT): $(PARTS) extension/load_order $(EXTENSION).control
	{ printf '%s\n' '\echo Use "CREATE EXTENSION $(EXTENSION)" to load this file. \quit' && cat $(PARTS); } > $@.part
	mv $@.part $@

install: ## install the extension for the PostgreSQL of PG_CONFIG; DESTDIR= stages it
uninstall: ## remove what install put there
clean: ## remove what was built

demo: ## show a small shop's jobs running; needs Python 3.11 only
test: ## run the tests; needs Python 3.11 only
lint: ## check the SQL and the Python
bench: ## measure it
$(FORWARDED):
	./run $@

help: ## show this
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1 \2/p' Makefile | while read -r goal what; do printf '  make %-10s %s\n' "$$goal" "$$what"; done

.PHONY: help $(FORWARDED)
.DEFAULT_GOAL := all
