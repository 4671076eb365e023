"""Networks as programs: captured once, cut at a layer, run without hooks."""
