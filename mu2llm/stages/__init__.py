"""The three training stages and the preference data between them, on Ray Train."""
