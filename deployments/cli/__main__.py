"""`python -m stagemesh.deployments.cli` is the `stagemesh` command."""

from stagemesh.deployments.cli.main import main

main()
