package main

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/protobuf/proto"
)

// each does something to every workload named, goes on after an error, and prints the name of each for which it worked,
// or the message it answered with.
func (a *app) each(ctx context.Context, refs []string, fn func(ref string) (proto.Message, error)) error {
	var errs []error
	for _, ref := range refs {
		m, err := fn(ref)
		if err == nil {
			err = a.printRef(ref, m)
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return errors.Join(errs...)
}

func (a *app) printRef(ref string, m proto.Message) error {
	if a.json() && m != nil {
		return a.printJSON(m)
	}
	_, err := fmt.Fprintln(a.stdout, ref)
	return err
}
