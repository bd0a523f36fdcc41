"""One module a backend; each offers `implementations()`: op name -> function with the op's signature."""
