package guest

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// loadModules loads kernel modules in the order given, which has dependencies first.
func loadModules(paths []string) error {
	for _, path := range paths {
		if err := loadModule(path); err != nil {
			return fmt.Errorf("cannot load %s: %w", path, err)
		}
	}
	return nil
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", 0)
	if errors.Is(err, unix.EEXIST) {
		err = nil // built in, or loaded already
	}
	if err != nil {
		return err
	}
	return unix.Unlink(path) // its pages are memory of the guest
}
