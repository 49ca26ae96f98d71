"""The run-time checker of signatures: beartype, with `int` allowed where `float` is written, as PEP 484 says."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
