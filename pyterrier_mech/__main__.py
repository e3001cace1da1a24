"""Runs the command line."""

from pyterrier_mech.cli import app

if __name__ == '__main__':
    app(prog_name='python -m pyterrier_mech')
