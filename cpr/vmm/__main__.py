"""`python -m cpr.vmm`, and the script of an update; `main` has the command line."""

import sys

if sys.flags.no_site:  # nobody has said yet where packages are: this is the script of an update
    sys.path.insert(0, __file__.rpartition("/cpr/vmm/")[0])
    from cpr.launcher import package_folders

    folders = package_folders()
    sys.path[:1] = folders  # first for now, so that nothing is looked for in vain
    sys.path[: len(folders)] = folders[:1]
    sys.path += folders[1:]

if __name__ == "__main__":
    from cpr.report import open_standard_descriptors

    open_standard_descriptors()
    from cpr.vmm.main import main

    sys.exit(main())
