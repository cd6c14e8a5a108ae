use super::*;

type Pairs<'a> = &'a [(&'a str, &'a str)];

/// Resolves a file with `text`, in an environment of `variables`.
fn resolved(text: &str, variables: Pairs) -> Result<StoreArgument> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.yml");
    fs::write(&path, text).unwrap();
    let result = resolve(&path, &variables.iter().map(|(name, value)| (name.into(), value.into())).collect());
    if let Ok(argument) = &result {
        assert_eq!(argument.from_config.as_deref(), Some(path.as_path()));
    }
    if let Err(error) = &result {
        assert!(error.to_string().contains("config.yml"), "{error}");
        assert!(error.to_string().contains("; "), "a next step: {error}");
        assert!(!error.to_string().contains('\n'), "one line: {error}");
    }
    result
}

#[track_caller]
fn assert_refused(text: &str, variables: Pairs, expected: &str) {
    let error = resolved(text, variables).expect_err(text);
    assert!(matches!(error, Error::Invalid { .. }), "{error:?}");
    assert!(error.to_string().contains(expected), "{text:?} gave: {error}");
}

const FILE: &str = "storage: {filesystem: {rootdirectory: /file}}";
const ROOT: &str = "REGISTRY_STORAGE_FILESYSTEM_ROOTDIRECTORY";

#[test]
fn a_directory_is_the_storage_root_whatever_the_environment_says() {
    let directory = tempfile::tempdir().unwrap();
    let argument = resolve(directory.path(), &Variables::from([(ROOT.into(), "/elsewhere".into())])).unwrap();
    assert_eq!(argument.storage_root, directory.path());
    assert_eq!((argument.from_config, argument.overridden_by.len()), (None, 0));
    assert_eq!((argument.delete_enabled, argument.read_only), (None, None));
}

#[test]
fn a_config_names_its_root_directory() {
    let cases = [
        (FILE, "/file"),
        ("version: 0.1\nstorage: filesystem", DEFAULT_ROOT_DIRECTORY),
        ("storage:\n  filesystem:\n", DEFAULT_ROOT_DIRECTORY),
        ("storage: {filesystem: {}}", DEFAULT_ROOT_DIRECTORY),
        ("storage: {filesystem: {maxthreads: 100}, tag: {concurrencylimit: 5}}", DEFAULT_ROOT_DIRECTORY),
        ("---\nstorage: {filesystem: {rootdirectory: '/a b'}, redirect: {disable: yes}}", "/a b"),
        ("storage: {filesystem: {rootdirectory: /1}}\nstorage: {filesystem: {rootdirectory: /2}}", "/2"),
        ("storage: {filesystem: {rootdirectory: /1, rootdirectory: /2}}", "/2"),
        ("x: &d {rootdirectory: /merged}\nstorage: {filesystem: {<<: *d}}", "/merged"),
        ("log: {level: 0100}\nhttp: {addr: :5000}\nstorage: {filesystem: {rootdirectory: /x}}", "/x"),
    ];
    for (text, expected) in cases {
        assert_eq!(resolved(text, &[]).unwrap().storage_root, Path::new(expected), "{text}");
    }
}

#[test]
fn the_debian_package_s_config_is_understood() {
    let text = "\
version: 0.1
log:
  fields:
    service: registry
storage:
  cache:
    blobdescriptor: inmemory
  filesystem:
    rootdirectory: /var/lib/docker-registry
  delete:
    enabled: true
http:
  addr: :5000
  headers:
    X-Content-Type-Options: [nosniff]
";
    let argument = resolved(text, &[]).unwrap();
    assert_eq!(argument.storage_root, Path::new("/var/lib/docker-registry"));
    assert_eq!((argument.delete_enabled, argument.read_only), (Some(true), Some(false)));
    assert_eq!(argument.descriptor_cache.as_deref(), Some("inmemory"));
    assert!(argument.overridden_by.is_empty());
}

#[test]
fn facts_are_read_as_the_registry_reads_them() {
    let facts = |text: &str, variables: Pairs| {
        let argument = resolved(&format!("storage: {{filesystem: , {text}}}"), variables).unwrap();
        (argument.delete_enabled, argument.read_only, argument.descriptor_cache)
    };
    assert_eq!(facts("", &[]), (Some(false), Some(false), None));
    assert_eq!(facts("delete: {enabled: on}", &[]).0, Some(true));
    assert_eq!(facts("delete: {enabled: 'true'}", &[]).0, Some(false));
    assert_eq!(facts("maintenance: {readonly: {enabled: yes}}", &[]).1, Some(true));
    assert_eq!(facts("cache: {layerinfo: redis}", &[]).2.as_deref(), Some("redis"));
    assert_eq!(facts("cache: {blobdescriptor: ''}", &[]).2, None);
    assert_eq!(facts("delete: ", &[("REGISTRY_STORAGE_DELETE_ENABLED", "true")]).0, Some(true));
    let readonly = [("REGISTRY_STORAGE_MAINTENANCE_READONLY", "{enabled: true}")];
    assert_eq!(facts("", &readonly).1, Some(true));
    let cache = [("REGISTRY_STORAGE_CACHE_BLOBDESCRIPTOR", "redis")];
    assert_eq!(facts("cache: {blobdescriptor: inmemory}", &cache).2.as_deref(), Some("redis"));
}

#[test]
fn the_most_specific_variable_wins() {
    let cases: [(&str, Pairs, &str); 9] = [
        (FILE, &[(ROOT, "/env")], "/env"),
        (FILE, &[(ROOT, "'/env'  # comment")], "/env"),
        (FILE, &[("REGISTRY_STORAGE", "filesystem")], DEFAULT_ROOT_DIRECTORY),
        (FILE, &[("REGISTRY_STORAGE", "{filesystem: {rootdirectory: /env}}")], "/env"),
        (FILE, &[("REGISTRY_STORAGE", "filesystem"), (ROOT, "/env")], "/env"),
        (FILE, &[("REGISTRY_STORAGE_FILESYSTEM", "{rootdirectory: /section}")], "/section"),
        (FILE, &[("REGISTRY_STORAGE_FILESYSTEM", "{rootdirectory: /section}"), (ROOT, "/env")], "/env"),
        ("log: {}", &[(ROOT, "/env")], "/env"),
        ("storage: s3", &[("REGISTRY_STORAGE", "filesystem"), (ROOT, "/env")], "/env"),
    ];
    for (text, variables, expected) in cases {
        let argument = resolved(text, variables).unwrap();
        assert_eq!(argument.storage_root, Path::new(expected), "{text} {variables:?}");
        assert_eq!(argument.overridden_by.len(), variables.len());
    }
}

/// With the filesystem driver and these sections.
fn sections(text: &str, variables: Pairs) -> StoreArgument {
    resolved(&format!("storage: filesystem\n{text}"), variables).unwrap()
}

#[test]
fn empty_means_unset() {
    let is_proxy = |text: &str, variables: Pairs| sections(text, variables).proxy.unwrap();
    let remote = "proxy: {remoteurl: 'https://registry-1.docker.io'}";
    assert!(is_proxy(remote, &[]));
    for nothing in
        ["", "proxy:", "proxy: {}", "proxy: {remoteurl: }", "proxy: {remoteurl: ''}", "proxy: {username: x}"]
    {
        assert!(!is_proxy(nothing, &[]), "{nothing}");
        assert!(is_proxy(nothing, &[("REGISTRY_PROXY_REMOTEURL", "https://hub")]), "{nothing}");
        assert!(is_proxy(nothing, &[("REGISTRY_PROXY", "{remoteurl: https://hub}")]), "{nothing}");
    }
    for variable in
        [("REGISTRY_PROXY_REMOTEURL", ""), ("REGISTRY_PROXY_REMOTEURL", "''"), ("REGISTRY_PROXY", "{}")]
    {
        assert!(!is_proxy(remote, &[variable]), "{variable:?}");
    }
    let caches = [("cache: {blobdescriptor: '', layerinfo: inmemory}"), ("cache:"), ("cache: {}")];
    for cache in caches {
        let argument = resolved(&format!("storage: {{filesystem: , {cache}}}"), &[]).unwrap();
        assert_eq!(argument.descriptor_cache, None, "{cache}");
    }
    let unset = [("REGISTRY_STORAGE_CACHE_BLOBDESCRIPTOR", "")];
    let argument = resolved("storage: {filesystem: , cache: {blobdescriptor: inmemory}}", &unset).unwrap();
    assert_eq!(argument.descriptor_cache, None);
}

#[test]
fn it_is_told_where_a_registry_answers() {
    let local = |rest: &str| Some(format!("http://{rest}"));
    let tls = |rest: &str| Some(format!("https://{rest}"));
    let cases: [(&str, Pairs, Option<String>); 27] = [
        ("http: {addr: ':5000'}", &[], local("127.0.0.1:5000")),
        ("http: {addr: :5000}", &[], local("127.0.0.1:5000")),
        ("http: {addr: '0.0.0.0:5000'}", &[], local("127.0.0.1:5000")),
        ("http: {addr: '[::]:5000'}", &[], local("127.0.0.1:5000")),
        ("http: {addr: '[::1]:5000'}", &[], local("[::1]:5000")),
        ("http: {addr: 'localhost:5000'}", &[], local("localhost:5000")),
        ("http: {addr: 'hub.example:5000'}", &[], local("hub.example:5000")),
        ("http: {addr: '10.1.2.3:80'}", &[], local("10.1.2.3:80")),
        ("http: {addr: ':0'}", &[], None),
        ("http: {addr: '5000'}", &[], None),
        ("http: {addr: ''}", &[], None),
        ("http:", &[], None),
        ("http: {host: 'https://hub.example/reg/'}", &[], tls("hub.example/reg")),
        ("http: {addr: :5000, host: 'https://hub.example'}", &[], local("127.0.0.1:5000")),
        ("http: {addr: :5000, prefix: /reg/}", &[], local("127.0.0.1:5000/reg")),
        ("http: {addr: :5000, prefix: /a/b}", &[], local("127.0.0.1:5000/a/b")),
        ("http: {addr: :5000, prefix: /}", &[], local("127.0.0.1:5000")),
        ("http: {addr: :5000}", &[("REGISTRY_HTTP_PREFIX", "/reg/")], local("127.0.0.1:5000/reg")),
        ("http: {addr: :5000, tls: {certificate: /c, key: /k}}", &[], tls("127.0.0.1:5000")),
        ("http: {addr: :5000, tls: {certificate: '', key: ''}}", &[], local("127.0.0.1:5000")),
        (
            "http: {addr: :5000, tls: {certificate: /c}}",
            &[("REGISTRY_HTTP_TLS_CERTIFICATE", "")],
            local("127.0.0.1:5000"),
        ),
        ("http: {addr: :5000, tls: {letsencrypt: {cachefile: /c}}}", &[], tls("127.0.0.1:5000")),
        (
            "http: {addr: :5000, tls: {letsencrypt: {cachefile: '', hosts: [a]}}}",
            &[],
            local("127.0.0.1:5000"),
        ),
        (
            "http: {addr: :5000}",
            &[("REGISTRY_HTTP_TLS", "{certificate: /c, key: /k}")],
            tls("127.0.0.1:5000"),
        ),
        (
            "http: {addr: :5000}",
            &[("REGISTRY_HTTP", "{addr: ':6000'}"), ("REGISTRY_HTTP_ADDR", ":7000")],
            local("127.0.0.1:7000"),
        ),
        ("http: {addr: /run/registry.sock, net: unix}", &[], Some("unix:/run/registry.sock".into())),
        (
            "http: {addr: :5000}",
            &[("REGISTRY_HTTP_NET", "unix"), ("REGISTRY_HTTP_ADDR", "/r.sock")],
            Some("unix:/r.sock".into()),
        ),
    ];
    for (text, variables, expected) in cases {
        assert_eq!(sections(text, variables).url, expected, "{text} {variables:?}");
    }
}

#[test]
fn a_redis_is_found_in_each_form_and_its_password_stays_a_secret() {
    let redis = |text: &str, variables: Pairs| sections(text, variables).redis;
    for nothing in ["", "redis:", "redis: {addr: ''}", "redis: {addrs: []}", "redis: {password: x}"] {
        assert_eq!(redis(nothing, &[]), None, "{nothing}");
    }
    let old = redis("redis: {addr: 'redis:6379', password: 1234, db: 2}", &[]).unwrap();
    assert_eq!((old.addresses.join(" "), old.database), ("redis:6379".into(), Some(2)));
    assert_eq!((old.password.as_deref(), &old.tls), (Some("1234"), &None));
    assert!(!format!("{old:?}").contains("1234"), "{old:?}");
    let tls = redis("redis: {addr: r:1, tls: {enabled: true}}", &[]).unwrap().tls;
    assert_eq!(tls, Some(RedisTls::default()));
    let new = redis("redis: {addrs: ['a:1', 'b:2'], username: u, tls: {rootcas: [/ca.pem]}}", &[]).unwrap();
    assert_eq!((new.addresses.len(), new.username.as_deref()), (2, Some("u")));
    assert_eq!(new.tls.unwrap().root_cas, ["/ca.pem"]);
    let variables =
        [("REGISTRY_REDIS_ADDR", "r:1"), ("REGISTRY_REDIS_DB", "3"), ("REGISTRY_REDIS_PASSWORD", "007")];
    let given = redis("redis: {addr: 'other:1', password: old}", &variables).unwrap();
    assert_eq!(
        (given.addresses.join(" "), given.database, given.password.unwrap()),
        ("r:1".into(), Some(3), "007".into())
    );
    assert_eq!(redis("", &[("REGISTRY_REDIS_ADDRS_0", "a:1")]).unwrap().addresses, ["a:1"]);
    assert_eq!(redis("", &[("REGISTRY_REDIS_ADDRS", "[a:1, b:2]")]).unwrap().addresses, ["a:1", "b:2"]);
    assert_eq!(redis("redis: {addr: r:1}", &[("REGISTRY_REDIS", "")]), None);
}

#[test]
fn whose_storage_it_is_is_told() {
    let database = |text: &str, variables: Pairs| sections(text, variables).database;
    for off in [
        "",
        "database:",
        "database: {enabled: false}",
        "database: {host: db}",
        "database: {enabled: 'false'}",
    ] {
        assert_eq!(database(off, &[]), None, "{off}");
        assert_eq!(database(off, &[("REGISTRY_DATABASE_ENABLED", "true")]), Some(Database::Enabled), "{off}");
    }
    assert_eq!(database("database: {enabled: true}", &[]), Some(Database::Enabled));
    assert_eq!(database("database: {enabled: 'true'}", &[]), Some(Database::Enabled));
    assert_eq!(database("database: {enabled: prefer}", &[]), Some(Database::Prefer));
    assert_eq!(database("database: {enabled: true}", &[("REGISTRY_DATABASE_ENABLED", "")]), None);
    for harbor in [
        "auth: {htpasswd: {realm: harbor-registry-basic-realm, path: /etc/registry/passwd}}",
        "auth: {token: {issuer: harbor-token-issuer, realm: 'https://hub/service/token'}}",
        "notifications: {endpoints: [{name: other, url: 'http://x'}, {name: harbor, url: 'http://core'}]}",
        "notifications: {endpoints: [{name: x, url: 'http://core:8080/service/notifications'}]}",
    ] {
        assert!(sections(harbor, &[]).is_harbor, "{harbor}");
    }
    assert!(sections("", &[("REGISTRY_AUTH_HTPASSWD_REALM", "harbor-registry-basic-realm")]).is_harbor);
    assert!(sections("", &[("REGISTRY_NOTIFICATIONS_ENDPOINTS_0_NAME", "harbor")]).is_harbor);
    assert!(
        !sections(
            "auth: {htpasswd: {realm: x}}\nnotifications: {endpoints: [{name: portus, url: 'http://p'}]}",
            &[]
        )
        .is_harbor
    );
}

#[test]
fn what_cannot_be_understood_is_refused_with_the_reason() {
    let large = format!("{FILE}\n#{}", "x".repeat(2 << 20));
    let cases = [
        ("", "is empty"),
        (" \n", "is empty"),
        ("# only a comment\n", "no storage driver"),
        ("storage: [", "not valid YAML"),
        ("\u{1}\u{2}", "not valid YAML"),
        ("storage: filesystem\n---\nstorage: s3", "not valid YAML: more than one document"),
        ("just text", "no registry configuration"),
        ("- a\n- b", "no registry configuration"),
        ("version: 0.1\nhttp: {addr: :5000}", "no storage driver"),
        ("storage: ", "no storage driver"),
        ("storage: {delete: {enabled: true}}", "no storage driver"),
        ("storage: [filesystem]", "neither a mapping nor"),
        ("storage: 7", "neither a mapping nor"),
        ("storage: {filesystem: {}, s3: {}}", "2 storage drivers (filesystem, s3)"),
        ("storage: {s3: {bucket: b}, cache: {}}", "the driver s3, and regfs reads the filesystem driver"),
        ("storage: inmemory", "the driver inmemory"),
        ("storage: {filesystem: /data}", "no mapping"),
        ("storage: {filesystem: {rootdirectory: data}}", "relative"),
        ("storage: {filesystem: {rootdirectory: ''}}", "empty"),
        ("storage: {filesystem: {rootdirectory: 123}}", "no string (123)"),
        ("storage: {filesystem: {rootdirectory: yes}}", "no string (true)"),
        ("storage: {filesystem: {rootdirectory: }}", "no string (null)"),
        ("storage: {filesystem: {rootdirectory: [/a]}}", "no string ([\"/a\"])"),
        (&large, "larger than 1 MiB"),
    ];
    for (text, expected) in cases {
        assert_refused(text, &[], expected);
    }
}

#[test]
fn a_refusal_names_the_variable_at_fault() {
    assert_refused(FILE, &[(ROOT, "")], ROOT);
    assert_refused(FILE, &[(ROOT, "data")], ROOT);
    assert_refused(FILE, &[(ROOT, ": :[")], ROOT);
    assert_refused(FILE, &[("REGISTRY_STORAGE", "")], "REGISTRY_STORAGE from the environment");
    assert_refused(FILE, &[("REGISTRY_STORAGE", "s3")], "the driver s3");
    assert_refused("storage: inmemory", &[(ROOT, "/env")], "2 storage drivers");
}

#[test]
fn bytes_missing_files_and_sockets_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let nothing = Variables::new();
    let missing = directory.path().join("missing");
    let error = resolve(&missing, &nothing).unwrap_err().to_string();
    assert!(error.contains("missing does not exist; give"), "{error}");

    let binary = directory.path().join("binary");
    fs::write(&binary, [0xff, 0xfe, 0]).unwrap();
    assert!(resolve(&binary, &nothing).unwrap_err().to_string().contains("is not text"));

    let socket = directory.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    assert!(resolve(&socket, &nothing).unwrap_err().to_string().contains("neither a directory nor"));
    // What became a pipe between the look and the open.
    let pipe = directory.path().join("pipe");
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
        .unwrap();
    let error = resolve_file(open_plain(&pipe).unwrap(), &pipe, &nothing).unwrap_err().to_string();
    assert!(error.contains("neither a directory nor"), "{error}");
}
