"""The commands as people type them: options, help, examples. What they do is in the modules of the same names above.

These modules are light: `--help` loads all of them, and neither Trio nor the library.
"""
