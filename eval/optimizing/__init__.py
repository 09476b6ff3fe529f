"""Model-optimization methods side by side.

A method is a module with `ROWS` (name -> Row: the lines it has in the table) and three functions:

    misfit(row, base) -> str | None           why the row cannot be had of this model on this machine
    build(row, context, folder) -> model      optimize `context.base(row)` and write all that `load` needs to `folder`
    load(folder) -> model                     the same model again, in a fresh process

To add one, write the module and name it in methods.py.
"""
