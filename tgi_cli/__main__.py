"""`python -m tgi_cli` is `tgi`."""

from tgi_cli.cli.entry import main

main()
