"""Write every page and table of figures: `python -m bench.pages`."""

from bench.pages.report import write_pages

write_pages()
