"""From a contrast to a plane, on the engine that will serve it."""
