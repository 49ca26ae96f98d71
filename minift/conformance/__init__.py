"""The properties that every implementation must satisfy, as a product.

    from minift.conformance import check
    check("nf4.quantize", my_function)      # a report, or the smallest input that fails
    check(reference, my_function, inputs={"x": matrices(2, 3)})    # the same for two functions that should agree

`minift conformance` holds all implementations against them that are installed, or a file of yours.
"""

from minift.conformance.agreement import matrices
from minift.conformance.operation import Implementation, Operation
from minift.conformance.report import Counterexample, Report
from minift.conformance.run import check

__all__ = ["Counterexample", "Implementation", "Operation", "Report", "check", "matrices"]
