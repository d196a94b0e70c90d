//! Finds MLX and mlx-c, compiles mlx-c (and, with `python`, the nanobind bridge), binds and links. Nothing else.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

/// MLX's C++ ABI changes between patch releases: the crate is built for exactly this one.
const MLX_VERSION: &str = "0.32.4";

/// The parts of mlx-c that the crate calls.
const MLX_C: [&str; 12] =
    ["array", "cuda", "device", "error", "map", "memory", "metal", "ops", "stream", "string", "transforms", "vector"];

fn main() {
    for name in ["MLXRS_MLX_DIR", "PYO3_PYTHON", "VIRTUAL_ENV", "LIBCLANG_PATH"] {
        println!("cargo:rerun-if-env-changed={name}");
    }
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=native");

    need(
        &env::var("CXX").unwrap_or_else(|_| "c++".into()),
        "a C++20 compiler (Debian: apt install g++, macOS: xcode-select --install)",
    );
    let mlx = mlx_dir();
    let include = mlx.join("include");
    check_version(&include);
    let (mlx_c, mlx_c_version) = mlx_c_dir();
    println!("cargo:rustc-env=MLXRS_MLX_C_VERSION={mlx_c_version}");
    let native = PathBuf::from("native");

    let mut build = cxx();
    build
        .include(&mlx_c)
        .include(&include)
        .flag("-include")
        .flag(native.join("mlx_c_compat.h").to_str().expect("UTF-8"));
    for part in MLX_C {
        build.file(mlx_c.join(format!("mlx/c/{part}.cpp")));
    }
    build.file(native.join("core.cpp")).compile("mlxrs_c");
    if env::var_os("CARGO_FEATURE_PYTHON").is_some() {
        bridge(&native, &include);
        if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("linux") {
            blas(&native);
        }
    }
    bind(&mlx_c, &native);
    link(&mlx.join("lib"));
    println!("cargo:rustc-env=MLXRS_MLX_VERSION={MLX_VERSION}");
    println!("cargo:rustc-env=MLXRS_COMPILER={}", first_line(&env::var("CXX").unwrap_or_else(|_| "c++".into())));
}

/// Stops the build with one line that says what to do.
fn stop(message: &str) -> ! {
    eprintln!("mlxrs_py: {message}");
    exit(1);
}

fn need(program: &str, what: &str) {
    if Command::new(program).arg("--version").output().is_err() {
        stop(&format!("`{program}` cannot be run; install {what}"));
    }
}

fn first_line(program: &str) -> String {
    let output = Command::new(program).arg("--version").output().map(|o| o.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).lines().next().unwrap_or("unknown").to_owned()
}

fn cxx() -> cc::Build {
    let mut build = cc::Build::new();
    build.cpp(true).std("c++20").warnings(false).flag("-fvisibility=hidden").define("NDEBUG", None);
    build
}

/// The interpreter that MLX, nanobind and libclang are installed for.
fn python() -> PathBuf {
    if let Some(python) = env::var_os("PYO3_PYTHON") {
        return python.into();
    }
    env::var_os("VIRTUAL_ENV").map_or_else(|| "python3".into(), |venv| Path::new(&venv).join("bin/python"))
}

/// What the interpreter prints for `code`, or None when it fails.
fn ask(code: &str) -> Option<String> {
    let output = Command::new(python()).args(["-c", code]).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// The folder of a Python package, found without importing it; `inner` must exist inside.
fn package_dir(package: &str, inner: &str) -> Option<PathBuf> {
    ask(&format!(
        "import importlib.util as u, os\n\
         s = u.find_spec('{package}')\n\
         print(next((p for p in s.submodule_search_locations if os.path.exists(os.path.join(p, '{inner}'))), '') if s else '')"
    ))
    .filter(|dir| !dir.is_empty())
    .map(PathBuf::from)
}

fn mlx_dir() -> PathBuf {
    if let Some(dir) = env::var_os("MLXRS_MLX_DIR") {
        return dir.into();
    }
    package_dir("mlx", "include/mlx/version.h").unwrap_or_else(|| {
        stop(&format!(
            "no MLX found for {}; set MLXRS_MLX_DIR to the folder that holds MLX's include/ and lib/, or pip install 'mlx[cpu]=={MLX_VERSION}'",
            python().display()
        ))
    })
}

fn check_version(include: &Path) {
    let file = include.join("mlx/version.h");
    // An MLX that has moved (pip builds in folders that it removes) must be found anew.
    println!("cargo:rerun-if-changed={}", file.display());
    let text = fs::read_to_string(&file).unwrap_or_else(|e| stop(&format!("cannot read {}: {e}", file.display())));
    let number = |name: &str| {
        let line = text.lines().find(|line| line.contains(&format!("#define MLX_VERSION_{name} ")));
        line.and_then(|line| line.split_whitespace().last()).unwrap_or("?").to_owned()
    };
    let found = format!("{}.{}.{}", number("MAJOR"), number("MINOR"), number("PATCH"));
    if found != MLX_VERSION {
        stop(&format!("built for MLX {MLX_VERSION}, but {} holds MLX {found}", include.display()));
    }
}

/// The sources of mlx-c inside the crate `mlx-sys`, which cargo fetched and checked but never builds.
fn mlx_c_dir() -> (PathBuf, String) {
    let metadata =
        cargo_metadata::MetadataCommand::new().exec().unwrap_or_else(|e| stop(&format!("cargo metadata failed: {e}")));
    let package = metadata.packages.iter().find(|package| package.name.as_str() == "mlx-sys");
    let package = package.unwrap_or_else(|| stop("cargo metadata knows no mlx-sys: is Cargo.lock complete?"));
    let dir = package.manifest_path.with_file_name("src").join("mlx-c");
    (dir.into(), format!("of mlx-sys {}", package.version))
}

/// nanobind and the file that meets Python's `mlx.core.array`.
fn bridge(native: &Path, include: &Path) {
    let nanobind = package_dir("nanobind", "src/nb_combined.cpp")
        .unwrap_or_else(|| stop("nanobind is missing; pip install nanobind==3.1.0"));
    let headers = ask("import sysconfig; print(sysconfig.get_path('include'))")
        .filter(|dir| Path::new(dir).join("Python.h").exists())
        .unwrap_or_else(|| stop("Python.h is missing; install Python's headers (Debian: apt install python3-dev)"));
    let mut build = cxx();
    build
        .define("NB_DOMAIN", "mlx")
        .flag("-fno-strict-aliasing")
        .include(headers)
        .include(nanobind.join("include"))
        .include(nanobind.join("ext/robin_map/include"))
        .include(nanobind.join("src"))
        .include(include)
        .file(nanobind.join("src/nb_combined.cpp"))
        .file(native.join("bridge.cpp"))
        .compile("mlxrs_bridge");
}

/// The object that hands the matrix products of libmlx to `OpenBLAS`; the wheel takes it out of `OUT_DIR`.
fn blas(native: &Path) {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("mlxrs_blas.so");
    let mut command = cc::Build::new().flag("-fvisibility=hidden").get_compiler().to_command();
    command.args(["-shared", "-o"]).arg(&out).arg(native.join("blas.c"));
    if !command.status().is_ok_and(|status| status.success()) {
        stop("native/blas.c does not compile; see above");
    }
}

/// mlx-c's names for Rust, by bindgen.
#[expect(unsafe_code, reason = "sets the variable by which bindgen finds libclang")]
fn bind(mlx_c: &Path, native: &Path) {
    if env::var_os("LIBCLANG_PATH").is_none()
        && let Some(clang) = package_dir("clang", "native")
    {
        // SAFETY: a build script with one thread; bindgen reads the variable when it loads libclang.
        unsafe { env::set_var("LIBCLANG_PATH", clang.join("native")) };
    }
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".into());
    let builtin = Command::new(compiler).arg("-print-file-name=include").output().map(|o| o.stdout).unwrap_or_default();
    // bindgen panics where libclang is missing: our one line says it better.
    std::panic::set_hook(Box::new(|_| ()));
    let made = std::panic::catch_unwind(|| {
        bindgen::Builder::default()
            .header(native.join("mlxrs.h").to_string_lossy())
            .clang_arg(format!("-I{}", mlx_c.display()))
            .clang_args(["-isystem", String::from_utf8_lossy(&builtin).trim()])
            .allowlist_function("mlx_.*|_mlx_array_is_available|mlxrs_.*")
            .blocklist_function(".*float16.*|.*complex64.*")
            .blocklist_type(".*float16.*")
            .default_enum_style(bindgen::EnumVariation::ModuleConsts)
            .layout_tests(false)
            .generate_comments(false)
            .merge_extern_blocks(true)
            .wrap_unsafe_ops(true)
            .rust_edition(bindgen::RustEdition::Edition2024)
            .generate()
    });
    let _ = std::panic::take_hook();
    let Ok(Ok(bindings)) = made else {
        stop("bindgen could not load libclang; pip install libclang==18.1.1, or set LIBCLANG_PATH")
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("mlx_c.rs");
    bindings.write_to_file(&out).unwrap_or_else(|e| stop(&format!("cannot write {}: {e}", out.display())));
}

/// Links libmlx dynamically. The wheel finds it beside itself; tests, examples and benches where it is now.
fn link(lib: &Path) {
    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=dylib=mlx");
    let here = format!("-Wl,-rpath,{}", lib.display());
    if env::var_os("CARGO_FEATURE_PYTHON").is_some() {
        let origin = if env::var("CARGO_CFG_TARGET_OS").as_deref() == Ok("macos") { "@loader_path" } else { "$ORIGIN" };
        println!("cargo:rustc-cdylib-link-arg=-Wl,-rpath,{origin}/../mlx/lib");
        for kind in ["tests", "examples", "benches"] {
            println!("cargo:rustc-link-arg-{kind}={here}");
        }
    } else {
        println!("cargo:rustc-link-arg={here}");
    }
}
