// Gendocs writes the reference of a program's configuration: a head, a table of the variables of the struct Config in a Go file, and below it the comment
// of each field. It is run by go generate in control/agent and control/controller; the results are committed.
package main

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"log"
	"os"
	"reflect"
	"strconv"
	"strings"
)

const source = "config.go"

func main() {
	log.SetFlags(0)
	log.SetPrefix("gendocs: ")
	if len(os.Args) != 3 || heads[os.Args[1]] == "" {
		log.Fatal("usage: gendocs OVERPLANE_|OVERPLANE_CONTROLLER_ OUTPUT")
	}
	text, err := render(source, os.Args[1])
	if err == nil {
		err = os.WriteFile(os.Args[2], text, 0o644)
	}
	if err != nil {
		log.Fatal(err)
	}
}

// heads are what the pages say before the table, by the variables' prefix.
var heads = map[string]string{
	"OVERPLANE_": `# Configuration of overplaned

<!-- Generated from control/agent/config.go by "go generate ./control/agent". Do not edit. -->

The node daemon takes its configuration from environment variables; under systemd from ` + "`/etc/overplane/overplaned.env`" + `. An empty
variable is one that is not set. All mistakes are reported at once, each with the variable, its value and what is allowed. A variable that starts with
` + "`OVERPLANE_`" + ` and is neither listed here nor another program's has no effect; the daemon warns of it and names the nearest one that it knows.

` + "`overplaned --check-config`" + ` says whether the configuration is right, ` + "`overplaned --print-config`" + ` how it is understood.
`,
	"OVERPLANE_CONTROLLER_": `# Configuration of overplane-controller

<!-- Generated from control/controller/config.go by "go generate ./control/controller". Do not edit. -->

The controller takes its configuration from environment variables; under systemd from ` + "`/etc/overplane/overplane-controller.env`" + `. An empty variable is one that is
not set. All mistakes are reported at once, and the ranges are validated as one set. An unknown variable that starts with ` + "`OVERPLANE_CONTROLLER_`" + ` has no effect; the controller warns of it.

` + "`overplane-controller serve --check-config`" + ` says whether the configuration is right, ` + "`overplane-controller serve --print-config`" + ` how it is understood. ` + "`backup`" + ` and
` + "`restore`" + ` keep what the controller stores; [joining.md](joining.md) and [running.md](running.md) have ` + "`pki`" + `.
`,
}

func render(path, prefix string) ([]byte, error) {
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	fields := configFields(file, prefix)
	if len(fields) == 0 {
		return nil, fmt.Errorf("%s has no struct Config", path)
	}
	var b bytes.Buffer
	b.WriteString(heads[prefix])
	b.WriteString(`
| Variable | Default | Allowed |
|---|---|---|
`)
	for _, f := range fields {
		def := "–"
		if f.def != "" {
			def = "`" + f.def + "`"
		}
		fmt.Fprintf(&b, "| [`%s`](#%s) | %s | %s |\n", f.name, strings.ToLower(f.name), def, f.allowed)
	}
	for _, f := range fields {
		fmt.Fprintf(&b, "\n## %s\n\n%s\n", f.name, f.comment)
	}
	return b.Bytes(), nil
}

type field struct{ name, def, allowed, comment string }

func configFields(file *ast.File, prefix string) []field {
	var out []field
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok || spec.Name.Name != "Config" {
			return true
		}
		for _, f := range spec.Type.(*ast.StructType).Fields.List {
			raw, err := strconv.Unquote(f.Tag.Value)
			if err != nil {
				log.Fatalf("field %s: %v", f.Names[0], err)
			}
			tag := reflect.StructTag(raw)
			comment := strings.TrimSpace(f.Doc.Text())
			if comment == "" || tag.Get("allowed") == "" {
				log.Fatalf("field %s needs a comment and an allowed tag", f.Names[0])
			}
			out = append(out, field{
				name: prefix + tag.Get("env"), def: tag.Get("envDefault"), allowed: tag.Get("allowed"),
				comment: strings.ReplaceAll(comment, "\n", " "),
			})
		}
		return false
	})
	return out
}
