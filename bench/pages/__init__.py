"""Pages of docs/ and tables of README.md, written from the records in bench/results."""
