"""What is known about each operation: its cases, its oracle with a bound, its laws. One file for each of minift's."""
