package policy

import (
	"errors"
	"fmt"
	"reflect"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/ext"
)

// Limits on conditions. What a request brings is hostile: a condition over it must end soon.
const (
	// maxExpressionRunes is about a hundred lines.
	maxExpressionRunes = 8192
	// maxExpressionDepth is how deep parentheses and calls nest.
	maxExpressionDepth = 64
	// maxCost is in CEL's units, about one per comparison or ten bytes of text looked at: some tens of milliseconds, and
	// enough to look at every word of the longest request the API lets through with a simple condition.
	maxCost = 2_000_000
)

// environment is the language of conditions: CEL with its standard functions, those on strings and sets, optional
// values, and the four variables. It has no clock, no randomness and no way to look at anything else, so that a decision
// can be repeated.
type environment struct{ cel *cel.Env }

func newEnvironment() (*environment, error) {
	object := func(t reflect.Type) *cel.Type { return cel.ObjectType(t.String()) }
	request, image, caller, host := reflect.TypeFor[requestFacts](), reflect.TypeFor[imageFacts](), reflect.TypeFor[callerFacts](), reflect.TypeFor[hostFacts]()
	env, err := cel.NewEnv(
		ext.NativeTypes(ext.ParseStructTags(true), request, image, caller, host),
		cel.Variable("request", object(request)),
		cel.Variable("image", object(image)),
		cel.Variable("caller", object(caller)),
		cel.Variable("host", object(host)),
		cel.OptionalTypes(),
		ext.Strings(ext.StringsVersion(1)),
		ext.Sets(),
		// Mistakes that could be seen at load are to be seen at load.
		cel.ExtendedValidations(),
		cel.ParserExpressionSizeLimit(maxExpressionRunes),
		cel.ParserRecursionLimit(maxExpressionDepth),
	)
	if err != nil {
		return nil, err
	}
	return &environment{env}, nil
}

// mistake is one thing wrong with an expression, and the index of the rune it is at.
type mistake struct {
	offset  int
	message string
}

// condition is a compiled expression. It may be evaluated by several goroutines at once.
type condition struct{ program cel.Program }

func (e *environment) compile(expression string) (*condition, []mistake) {
	ast, issues := e.cel.Compile(expression)
	if err := issues.Err(); err != nil {
		var out []mistake
		for _, m := range issues.Errors() {
			out = append(out, mistake{offsetOf(expression, m.Location.Line(), m.Location.Column()), firstLine(m.Message)})
		}
		if len(out) == 0 {
			out = append(out, mistake{0, firstLine(err.Error())})
		}
		return nil, out
	}
	if !ast.OutputType().IsExactType(cel.BoolType) {
		return nil, []mistake{{0, fmt.Sprintf("the condition must be true or false, and it is of type %s", ast.OutputType())}}
	}
	program, err := e.cel.Program(ast, cel.CostLimit(maxCost))
	if err != nil {
		return nil, []mistake{{0, firstLine(err.Error())}}
	}
	return &condition{program}, nil
}

// matches evaluates the condition.
func (c *condition) matches(facts map[string]any) (bool, error) {
	out, _, err := c.program.Eval(facts)
	if err != nil {
		return false, err
	}
	matched, isBool := out.Value().(bool)
	if !isBool {
		return false, errors.New("it is neither true nor false")
	}
	return matched, nil
}

// offsetOf is the index of the rune at a line, counted from 1, and a column, counted from 0. An unknown place is the start.
func offsetOf(text string, line, column int) int {
	offset := 0
	for i, l := range strings.SplitAfter(text, "\n") {
		if i+1 == line {
			return offset + max(column, 0)
		}
		offset += len([]rune(l))
	}
	return 0
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
