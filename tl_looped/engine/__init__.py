"""The ground that every room stands on, and the engine that runs a model; users import from the rooms."""
