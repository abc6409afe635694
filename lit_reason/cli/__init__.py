"""Console scripts: lit-reason-train, -eval, -generate, -zoo."""
