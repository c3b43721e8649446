"""The command line: one module for each group of commands.

In: arguments. Out: calls into the package, tables and messages on the terminal.
"""
