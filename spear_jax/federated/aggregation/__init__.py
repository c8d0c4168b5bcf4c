"""How the adapters of a cohort become the next global adapter: a reducer, then a server optimiser."""
