"""Language models as pure functions of (adapter, base, tokens), and their files in and out."""
