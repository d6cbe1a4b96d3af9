// Gendocs writes the reference of the daemon's configuration: a table of the variables of agent.Config, and below it the comment of each
// field. It is run by go generate in control/agent; the result is committed.
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
	if len(os.Args) != 2 {
		log.Fatal("usage: gendocs OUTPUT")
	}
	text, err := render(source)
	if err == nil {
		err = os.WriteFile(os.Args[1], text, 0o644)
	}
	if err != nil {
		log.Fatal(err)
	}
}

func render(path string) ([]byte, error) {
	file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ParseComments)
	if err != nil {
		return nil, err
	}
	fields := configFields(file)
	if len(fields) == 0 {
		return nil, fmt.Errorf("%s has no struct Config", path)
	}
	var b bytes.Buffer
	b.WriteString(`# Configuration of overplaned

<!-- Generated from control/agent/config.go by "go generate ./control/agent". Do not edit. -->

The node daemon takes its configuration from environment variables; under systemd from ` + "`/etc/overplane/overplaned.env`" + `. An empty
variable is one that is not set. All mistakes are reported at once, each with the variable, its value and what is allowed. A variable that starts with
` + "`OVERPLANE_`" + ` and is neither listed here nor another program's has no effect; the daemon warns of it and names the nearest one that it knows.

` + "`overplaned --check-config`" + ` says whether the configuration is right, ` + "`overplaned --print-config`" + ` how it is understood.

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

func configFields(file *ast.File) []field {
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
				name: "OVERPLANE_" + tag.Get("env"), def: tag.Get("envDefault"), allowed: tag.Get("allowed"),
				comment: strings.ReplaceAll(comment, "\n", " "),
			})
		}
		return false
	})
	return out
}
