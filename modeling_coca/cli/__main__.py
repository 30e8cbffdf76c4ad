"""`python -m modeling_coca.cli`, which launchers such as `accelerate launch -m` need."""

from .main import main

if __name__ == "__main__":
    main()
