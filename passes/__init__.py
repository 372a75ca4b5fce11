"""The passes of moec: normalise, roll, detect, lower, verify. Imported as `moec.passes`; see docs/design.md."""

if __name__ == "passes":
    raise ImportError("these are moec's passes; say `from moec.passes import ...`, not `import passes`")
