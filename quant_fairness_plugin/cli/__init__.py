"""The command line: one thin file per command, each parses, calls one library function, and prints.

stdout carries the result and nothing else; progress, warnings and errors go to stderr. Nothing here imports torch
before the arguments were checked.
"""
