"""The commands of ``perta``, one a module: ``add`` declares its options, ``run`` calls the package."""
