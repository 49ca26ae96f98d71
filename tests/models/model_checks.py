"""What every network is asked besides its numbers: its defaults, what a pass keeps, and the keys that dropout gets."""

import inspect
import weakref


def defaults(function):
    """What one gets without asking."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def watch_blocks(module, patch):
    """() -> layers whose activations are kept, and a list to which each layer run backward is added."""
    block, pullbacks, run_backward = module.block, {}, []

    def watched(params, x, visible, config, layer, *rest):
        y, vjp = block(params, x, visible, config, layer, *rest)

        def watched_vjp(dy):
            run_backward.append(layer)
            return vjp(dy)

        pullbacks[layer] = weakref.ref(watched_vjp)
        return y, watched_vjp

    patch.setattr(module, "block", watched)
    return lambda: [layer for layer, vjp in pullbacks.items() if vjp() is not None], run_backward


def dropout_keys(module, patch):
    """The keys that the linear maps of a pass get, in the order of the computation."""
    linear, keys = module.linear, []

    def recorded(*args, dropout_key=None):
        keys.append(dropout_key)
        return linear(*args, dropout_key=dropout_key)

    patch.setattr(module, "linear", recorded)
    return keys
