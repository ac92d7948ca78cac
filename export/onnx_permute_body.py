"""The body of the ONNX node PermuteAddresses, in standard operators: the text of `onnx.parser`."""

from __future__ import annotations

from ultramem.ops.permute_addresses import PASSES, ROUNDS


def permute_addresses_body() -> str:
    """The Feistel rounds of `ultramem.ops.permute_addresses`, written out."""
    keys = [f"key_{index}" for index in range(4 * PASSES * ROUNDS)]
    lines = [
        "PermuteAddresses <size, sides, keys> (addresses) => (permuted)",
        "{",
        "  sides = Constant <value_ints: ints = @sides> ()",
        "  a, b = Split <axis: int = 0, num_outputs: int = 2> (sides)",
        "  keys = Constant <value_ints: ints = @keys> ()",
        f"  {', '.join(keys)} = Split <axis: int = 0, num_outputs: int = {len(keys)}> (keys)",
        "  size = Constant <value_int: int = @size> ()",
        "  two = Constant <value_int: int = 2> ()",
        "  half = Div (size, two)",
        "  covered = Mul (a, b)",
        f"  bits_16 = Constant <value_int: int = {2**16}> ()",
        f"  bits_31 = Constant <value_int: int = {2**31}> ()",
    ]
    before = "addresses"
    for number in range(PASSES):
        if number:
            lines += [f"  moved_{number} = Add ({before}, half)", f"  turned_{number} = Mod (moved_{number}, size)"]
            before = f"turned_{number}"
        high, low = f"high_{number}", f"low_{number}"
        lines += [f"  {high} = Div ({before}, b)", f"  {low} = Mod ({before}, b)"]
        for index in range(ROUNDS):
            name, key = f"{number}_{index}", keys[4 * (number * ROUNDS + index) :]
            source, target, side = (low, high, "a") if index % 2 == 0 else (high, low, "b")
            lines += [
                f"  scaled_{name} = Mul ({source}, {key[0]})",
                f"  added_{name} = Add (scaled_{name}, {key[1]})",
                f"  mixed_{name} = Mod (added_{name}, bits_31)",
                f"  square_{name} = Mul (mixed_{name}, mixed_{name})",
                f"  cut_{name} = Div (square_{name}, bits_16)",
                f"  middle_{name} = Mod (cut_{name}, bits_31)",
                f"  again_{name} = Mul (middle_{name}, {key[2]})",
                f"  summed_{name} = Add (again_{name}, {key[3]})",
                f"  shifted_{name} = Div (summed_{name}, bits_16)",
                f"  word_{name} = Mod (shifted_{name}, bits_31)",
                f"  wide_{name} = Mul (word_{name}, {side})",
                f"  hash_{name} = Div (wide_{name}, bits_31)",
                f"  sum_{name} = Add ({target}, hash_{name})",
                f"  new_{name} = Mod (sum_{name}, {side})",
            ]
            if index % 2 == 0:
                high = f"new_{name}"
            else:
                low = f"new_{name}"
        after = "permuted" if number == PASSES - 1 else f"after_{number}"
        lines += [
            f"  start_{number} = Mul ({high}, b)",
            f"  joined_{number} = Add (start_{number}, {low})",
            f"  inside_{number} = Less ({before}, covered)",
            f"  {after} = Where (inside_{number}, joined_{number}, {before})",
        ]
        before = after
    return "\n".join([*lines, "}"])
