"""The properties that every implementation must satisfy, as a product.

    from minift.conformance import check
    check("nf4.quantize", my_function)      # a report, or the smallest input that fails

`minift conformance` holds all implementations against them that are installed, or a file of yours.
"""

from minift.conformance.operation import Implementation, Operation
from minift.conformance.report import Counterexample, Report
from minift.conformance.run import check

__all__ = ["Counterexample", "Implementation", "Operation", "Report", "check"]
