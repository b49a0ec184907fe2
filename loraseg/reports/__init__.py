"""HTML reports: self-contained pages built from blocks (tables, curves, pictures, settings).

A report's module fills an :class:`~loraseg.reports.page.HtmlReport` with values; every page shares
one template, one style sheet and one macro per kind of block. Text tables for the terminal are in
:mod:`loraseg.reports.text_table`.
"""

__all__: list[str] = []
