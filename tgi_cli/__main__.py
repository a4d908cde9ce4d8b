"""`python -m tgi_cli` is `tgi`."""

from tgi_cli.cli.app import main

main()
