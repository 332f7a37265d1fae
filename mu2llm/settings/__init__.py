"""What can be set, a file for each room. Nothing here imports torch, Ray or a room: every command starts quickly.

`mu2llm.config` puts them together and loads presets.
"""
