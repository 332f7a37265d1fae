"""The model behind an HTTP API, on Ray Serve: reports, GREEN scores, corrections, the reading room."""
