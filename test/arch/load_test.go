// Package arch tests what the code looks like from outside: who imports whom, where unsafe may stand, that everything public is explained. The
// rules are functions over what `go list` and the parser say, so that each is first tried on a package made up to break it.
package arch

import (
	"encoding/json"
	"errors"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

const module = "github.com/overplane/overplane/"

// pkg is a package as `go list -json` describes it.
type pkg struct {
	ImportPath string
	Name       string
	Dir        string

	GoFiles, CgoFiles, IgnoredGoFiles []string
	TestGoFiles, XTestGoFiles         []string

	Imports, TestImports, XTestImports []string // direct
	Deps                               []string // of the non-test files, transitive
}

// path is the package's path within the module.
func (p *pkg) path() string { return strings.TrimPrefix(p.ImportPath, module) }

// source is one file of a package.
type source struct {
	pkg       *pkg
	name      string // relative to the module's root
	test      bool
	generated bool
	lines     int
	syntax    *ast.File
}

// list is the module's packages. Broken ones are among them: what is broken is for the compiler to say.
var list = sync.OnceValues(func() ([]*pkg, error) {
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Name,Dir,GoFiles,CgoFiles,IgnoredGoFiles,TestGoFiles,XTestGoFiles,Imports,TestImports,XTestImports,Deps", "./...")
	cmd.Dir = root
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	var all []*pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		p := new(pkg)
		if err := d.Decode(p); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return nil, err
		}
		all = append(all, p)
	}
})

// root is the module's root, seen from this package.
const root = "../.."

func packages(t *testing.T) []*pkg {
	all, err := list()
	require.NoError(t, err, "go list")
	require.NotEmpty(t, all)
	return all
}

// sources parses every file of the module, those for other architectures too.
func sources(t *testing.T) []*source {
	abs, err := filepath.Abs(root)
	require.NoError(t, err)
	var all []*source
	for _, p := range packages(t) {
		for i, names := range [][]string{p.GoFiles, p.CgoFiles, p.IgnoredGoFiles, p.TestGoFiles, p.XTestGoFiles} {
			for _, name := range names {
				file := filepath.Join(p.Dir, name)
				fset := token.NewFileSet()
				syntax, err := parser.ParseFile(fset, file, nil, parser.ParseComments|parser.SkipObjectResolution)
				require.NoError(t, err)
				rel, err := filepath.Rel(abs, file)
				require.NoError(t, err)
				all = append(all, &source{
					pkg: p, name: rel, test: i >= 3 || strings.HasSuffix(name, "_test.go"),
					generated: ast.IsGenerated(syntax), lines: fset.File(syntax.FileStart).LineCount(), syntax: syntax,
				})
			}
		}
	}
	return all
}

// under reports whether an import path, or a path in the module, is prefix or below it.
func under(path, prefix string) bool { return path == prefix || strings.HasPrefix(path, prefix+"/") }

func underAny(path string, prefixes ...string) bool {
	for _, p := range prefixes {
		if under(path, p) {
			return true
		}
	}
	return false
}

// standard reports whether an import path is the standard library's: the first element of no other contains no dot.
func standard(path string) bool {
	first, _, _ := strings.Cut(path, "/")
	return !strings.Contains(first, ".")
}

// check fails with each breach on a line of its own and, once, why the rule exists.
func check(t *testing.T, why string, breaches []string) {
	t.Helper()
	if len(breaches) > 0 {
		t.Errorf("%s\n\nWhy: %s", strings.Join(breaches, "\n"), why)
	}
}
