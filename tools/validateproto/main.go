// Command validateproto writes buf/validate/validate.proto, as the protovalidate Go module carries it, below a directory,
// so that buf finds the import without a registry of its own.
package main

import (
	"fmt"
	"os"
	"path/filepath"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	"github.com/jhump/protoreflect/v2/protoprint"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: validateproto DIR")
		os.Exit(2)
	}
	if err := write(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "validateproto:", err)
		os.Exit(1)
	}
}

func write(dir string) error {
	file := validate.File_buf_validate_validate_proto
	path := filepath.Join(dir, file.Path())
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("cannot make directory: %w", err)
	}
	out, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("cannot create proto file: %w", err)
	}
	if err := new(protoprint.Printer).PrintProtoFile(file, out); err != nil {
		return fmt.Errorf("cannot print descriptor: %w", err)
	}
	return out.Close()
}
