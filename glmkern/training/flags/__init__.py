"""The official command line: its flags, their parser and their checks; none imports torch."""
